"""Where the tokens of a batch sit: a class for each layout, and how one is chosen."""

from holdfast.data.layouts.padded import DataCollatorForPreference as DataCollatorForPreference
from holdfast.data.layouts.padded import PaddedLayout as PaddedLayout
from holdfast.data.layouts.prefix_shared import SharedLayout as SharedLayout
