"""Where cached tokens lie, what policies see of them, and the copies that every step makes."""
