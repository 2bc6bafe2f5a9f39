"""Helpers for all packages. They import nothing else of the library, and torch only where a module needs it."""
