"""What commands compute that drive nothing: data is returned, nothing is printed."""
