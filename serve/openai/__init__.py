"""OpenAI's routes: what a request may contain, how it is answered, and how the answer is sent."""
