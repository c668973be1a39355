"""One language model across a device and the cloud; see docs/structure.md for the map of the rooms."""
