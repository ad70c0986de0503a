"""One thin module a framework, on top of the core; each says what to install where its framework is missing."""
