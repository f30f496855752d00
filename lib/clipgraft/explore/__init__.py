"""The page that tries the models of a finished run; see `page` and workflow/docs/explore.md."""
