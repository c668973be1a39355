"""How the learned policies come about; nothing here decides anything at run time, and `policies` does not know it."""
