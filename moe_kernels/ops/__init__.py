"""Ops, one module each: kernels, registration and public function."""
