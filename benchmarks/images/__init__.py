"""Parts of the task images: photographs, token merging after ToMe, figures of vectors."""
