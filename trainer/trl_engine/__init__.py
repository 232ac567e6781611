"""`engine: trl`: TRL's own trainers take the updates. Imported only when asked for, since TRL takes seconds to load."""
