"""The templates in ``workflows/`` and the subgraph blueprints in ``subgraphs/``: built, laid out, run and pictured."""
