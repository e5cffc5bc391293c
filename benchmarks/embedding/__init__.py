"""Other ways to run texts through an exported folder: scripts, for one of them needs packages of its own."""
