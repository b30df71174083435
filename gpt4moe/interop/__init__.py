"""Foreign formats in and out; nothing else knows them."""
