"""What edge and device nodes have in common: a node takes a latent and the rest of a route, runs its own
segments, and passes the result on.
"""
