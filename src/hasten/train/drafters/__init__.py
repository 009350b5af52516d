"""Training of small models that draft for a target: on its own dialogues, by its own distributions."""
