"""Ops: one module each, with its kernels, its public function and its choice among them."""
