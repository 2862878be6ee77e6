"""Real image sets, their splits, a stateless order of batches, and augmentation per sample."""

from metacal.data.augment import AUGMENTATIONS as AUGMENTATIONS
from metacal.data.augment import Augmentation as Augmentation
from metacal.data.augment import augmenter as augmenter
from metacal.data.augment import views as views
from metacal.data.images import Images as Images
from metacal.data.images import resize as resize
from metacal.data.images import to_float as to_float
from metacal.data.order import batch_indices as batch_indices
from metacal.data.sets import NAMES as NAMES
from metacal.data.sets import load as load
from metacal.data.splits import split_per_class as split_per_class
from metacal.data.splits import split_validation as split_validation
