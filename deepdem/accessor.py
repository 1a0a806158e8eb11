"""The ``.deepdem`` accessor: one-liners over the rooms of the package."""
