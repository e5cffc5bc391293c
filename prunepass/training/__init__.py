"""Training of predictors and gates, and search without training."""
