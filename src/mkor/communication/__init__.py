"""Everything that passes between processes; the only importers of ``torch.distributed``."""
