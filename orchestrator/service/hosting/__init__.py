"""How the service is reached: its address, its login by code, and the files with which machines start it."""
