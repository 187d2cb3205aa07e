"""What is served where nothing is said."""

HOST, PORT = "127.0.0.1", 8080
MAX_TOKENS = 8192  # of an answer: enough for gptme to save a file in one piece
