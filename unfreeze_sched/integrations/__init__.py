"""One thin module a framework; each says what to install where its framework is missing."""
