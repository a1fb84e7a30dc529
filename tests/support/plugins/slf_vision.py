"""Tiny vocabularies: ms-swift's Qwen-VL templates have the ids of Qwen's own image and video tokens written into them.

The tests' tokenizer has the same tokens at other places.
"""

import wrapt


@wrapt.when_imported("swift.template.templates.qwen")
def _read_ids(module):
    original = module.Qwen2VLTemplate.init_env_args

    def init_env_args(self):
        original(self)
        config = getattr(self.config, "thinker_config", self.config)  # Omni's
        self.image_token_id, self.video_token_id = config.image_token_id, config.video_token_id

    module.Qwen2VLTemplate.init_env_args = init_env_args
