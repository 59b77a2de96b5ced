"""Who serves: one room per engine, each with its facts, what it writes and what it reads."""
