"""Models that go by a name: those that ship, and those that `hasten pull` gets. Nothing here imports PyTorch."""
