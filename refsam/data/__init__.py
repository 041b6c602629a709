"""Data: the datasets of referring video segmentation, clips and augmentation, and clips that refsam draws itself."""

from refsam.data.catalogue import open_dataset
from refsam.data.dataset import DataError, Expression, ReferringDataset, VideoRecord

__all__ = ["DataError", "Expression", "ReferringDataset", "VideoRecord", "open_dataset"]
