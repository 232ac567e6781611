"""The processes of one trial: process group, rendezvous, sharded parameters."""
