"""Where the tokens of a batch stand: a class for each layout, and how one is chosen."""

from holdfast.data.layouts.packed import PackedLayout as PackedLayout
from holdfast.data.layouts.padded import PaddedLayout as PaddedLayout
from holdfast.data.layouts.preference_collator import DataCollatorForPreference as DataCollatorForPreference
from holdfast.data.layouts.prefix_shared import SharedLayout as SharedLayout
