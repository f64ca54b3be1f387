"""The Hydra configuration of every run; `hydra.searchpath=[pkg://lion_lightning.conf]` adds it to another project's."""
