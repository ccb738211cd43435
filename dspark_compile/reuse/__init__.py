"""What a compilation made, kept for the next process.

key.py      a hash of all that a compiled graph depends on, or why it has none
layout.py   a native program's layout as JSON, and back
inputs.py   how the program's inputs come of the caller's, as JSON, and back
files.py    the folder: atomic writes, nobody else's files
steps.py    a graph that became one native call: kept, and found again
"""
