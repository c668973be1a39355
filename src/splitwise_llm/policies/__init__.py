"""Every decision maker, ours and the field's, under one interface. It does not know where observations come from."""
