"""``python -m fusionpasses bench``: the norm + quant ops beside a plain copy, eager torch, Inductor and peers.

timing    how a time is taken, and the copy that every time is compared with
chains    the chains that are measured, and everyone who runs them
peers     kernels of other projects, when a checkout of theirs is given
run       the command: measure, check, print, write
plot      the roofline picture
"""
