"""One model over preference pairs: layout, attention, body and output layer."""
