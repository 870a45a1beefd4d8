"""The live page: what a run shows in a browser while it goes on.

The runner publishes the state of the run for viewers (``show``), as it sees it (``scene``); the page (``page/``, plain
files) reads that from the broker over WebSockets, through one door of this machine (``gate``).
"""
