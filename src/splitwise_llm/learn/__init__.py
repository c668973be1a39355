"""Learning: how the policies that have weights get them. Nothing here decides; `policies` does not know it."""
