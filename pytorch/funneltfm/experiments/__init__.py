"""Named experiments: settings of `funneltfm train` in YAML files, and what runs them."""
