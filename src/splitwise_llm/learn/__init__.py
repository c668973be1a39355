"""How the learned policies come about; nothing here decides anything at run time."""
