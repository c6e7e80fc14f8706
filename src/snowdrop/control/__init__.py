"""The API, and the loop that brings what is there to what should be: observe, decide, order."""
