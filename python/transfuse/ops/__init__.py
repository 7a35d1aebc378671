"""One page per op: signature, contract, problem, the ordered list of implementations, autograd, fake kernel."""
