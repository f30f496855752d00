"""Sources: one module per form that people have data in; `download` picks the one it needs."""
