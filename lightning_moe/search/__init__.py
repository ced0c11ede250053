"""DiEP: which experts matter, learned by gradient (arXiv 2509.16105)."""
