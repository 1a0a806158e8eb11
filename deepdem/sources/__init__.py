"""Where layers come from: each file of this folder turns one kind of source into layers."""
