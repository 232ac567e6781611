"""`engine: trl`: updates by TRL's trainers. Imported only when needed, since importing TRL takes seconds."""
