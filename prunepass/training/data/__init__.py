"""What comes into a training: files, columns, labels, features and heads."""
