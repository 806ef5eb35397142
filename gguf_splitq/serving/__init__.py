# SPDX-License-Identifier: MIT
"""A file at work: in a server or a chat of the built llama.cpp, and in an installed Ollama."""
