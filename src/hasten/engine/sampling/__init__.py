"""Which token: parameters, the one processed distribution, its noise, and constraints."""
