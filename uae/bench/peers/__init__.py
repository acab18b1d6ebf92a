"""What a user would take instead: other programs on the same inputs, each in a process of its own, each optional.

`uae.bench.peers.run` starts them; the modules named after them run inside those processes, where perhaps nothing but
numpy and the peer itself is installed. So this module imports nothing.
"""
