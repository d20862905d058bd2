"""Embeds cells that are not in a Census: an AnnData, an h5ad or zarr file, or a SOMA experiment.

`embed` is the function for Python, `embed_file` what the command calls. The model, the tokens and the devices are those
of a release.
"""
