"""What tests share: graphs, small models, files, servers."""
