"""Is a plan right? Proved on a small model of the same class, and remembered by a fingerprint of what was proved."""
