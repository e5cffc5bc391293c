"""Parts of the task speech: Whisper's weights, clips and their texts, word errors."""
