"""Where this pack touches ComfyUI's internals, and the versions in which each touch was seen to hold.

`tests/comfy/guard/test_touches.py` looks every name up in the ComfyUI that runs the tests, and every place of ours in
the code; `tests/comfy/guard/test_versions.py` tries what differs between versions. Of a version that is not named for a
touch it is not known whether it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

OLDER, NEWER = "0.3.75", "0.33.0"
How = Literal["run", "read"]  # tests that use the touch passed in this version; or its source was read


@dataclass(frozen=True)
class Touch:
    """One use of something that ComfyUI does not promise to keep.

    Attributes:
        name: What is used, as a path of ComfyUI's modules and their attributes.
        place: Our file and the function, class or constant that uses it.
        seen: Version -> how it was seen to hold there.
    """

    name: str
    place: str
    seen: Mapping[str, How]


_RUN: Mapping[str, How] = MappingProxyType({OLDER: "run", NEWER: "run"})
_READ: Mapping[str, How] = MappingProxyType({OLDER: "run", NEWER: "read"})
_OLDER: Mapping[str, How] = MappingProxyType({OLDER: "run"})
_NEWER: Mapping[str, How] = MappingProxyType({NEWER: "run"})


def _touches(place: str, seen: Mapping[str, How], *names: str) -> tuple[Touch, ...]:
    return tuple(Touch(name, f"comfy_host/{place}", seen) for name in names)


_PATCHER, _SAMPLERS = "comfy.model_patcher.ModelPatcher", "comfy.samplers"

TOUCHES: tuple[Touch, ...] = (
    # the guarded model and its runs
    *_touches("patcher.py:GuardMixin", _RUN, f"{_PATCHER}.inject_model", f"{_PATCHER}.eject_model"),
    *_touches("patcher.py:GuardMixin", _RUN, f"{_PATCHER}.pre_run", f"{_PATCHER}.cleanup", f"{_PATCHER}.is_injected"),
    *_touches("patcher.py:GuardMixin", _RUN, f"{_PATCHER}.clone", f"{_PATCHER}.parent", f"{_PATCHER}.size"),
    *_touches("patcher.py:GuardMixin", _RUN, f"{_PATCHER}.partially_load", f"{_PATCHER}.add_object_patch"),
    *_touches("patcher.py:GuardMixin", _RUN, f"{_PATCHER}.add_patches", f"{_PATCHER}.get_key_patches"),
    *_touches("patcher.py:GuardMixin", _RUN, f"{_PATCHER}.model_state_dict", f"{_PATCHER}.add_hook_patches"),
    *_touches("patcher.py:GuardMixin", _RUN, f"{_PATCHER}.set_injections", f"{_PATCHER}.add_weight_wrapper"),
    *_touches("patcher.py:GuardMixin", _NEWER, f"{_PATCHER}.state_dict_for_saving"),
    *_touches("patcher.py:GuardMixin", _NEWER, f"{_PATCHER}.model_state_dict_for_saving"),
    *_touches("patcher.py:_check_clean", _RUN, f"{_PATCHER}.patches", f"{_PATCHER}.hook_patches"),
    *_touches("patcher.py:_check_clean", _RUN, f"{_PATCHER}.injections", f"{_PATCHER}.weight_wrapper_patches"),
    *_touches("patcher.py:_check_clean", _RUN, f"{_PATCHER}.object_patches", f"{_PATCHER}.additional_models"),
    *_touches("patcher.py:SKIPPING_WRAPPERS", _RUN, f"{_PATCHER}.wrappers"),
    *_touches("patcher.py:OUTER_SAMPLE", _RUN, "comfy.patcher_extension.WrappersMP.OUTER_SAMPLE"),
    *_touches("patcher.py:_outer_sample", _RUN, f"{_SAMPLERS}.CFGGuider.outer_sample"),
    *_touches("patcher.py:_outer_sample", _RUN, "comfy.patcher_extension.WrapperExecutor.class_obj"),
    *_touches("patcher.py:_outer_sample", _READ, "comfy.patcher_extension.WrapperExecutor.original"),
    *_touches("patcher.py:_silence_previews", _RUN, "latent_preview.prepare_callback"),
    *_touches("patcher.py:_Denoised", _RUN, "comfy_extras.nodes_custom_sampler.SamplerCustomAdvanced.execute"),
    *_touches("run.py:given_out", _RUN, "comfy.model_base.BaseModel.process_latent_out"),
    *_touches("run.py:given_out", _READ, "comfy.nested_tensor.NestedTensor"),
    *_touches("image_values.py:ENCODED", _RUN, "comfy.text_encoders"),
    *_touches("patcher.py:encoded", _RUN, "comfy.conds.CONDList", "nodes.GLIGENTextBoxApply.append"),
    *_touches("patcher.py:common_ksampler", _RUN, "nodes.common_ksampler"),
    *_touches("patcher.py:GuardedClipMixin", _RUN, "comfy.sd.CLIP.clone", "comfy.sd.CLIP.encode_from_tokens"),
    *_touches("patcher.py:GuardedClipMixin", _RUN, "comfy.sd.CLIP.encode_from_tokens_scheduled"),
    *_touches("patcher.py:GuardedClipMixin", _RUN, "comfy.sd.CLIP.get_sd", "comfy.sd.CLIP.load_sd"),
    *_touches("guard_cache.py:key", _RUN, f"{_PATCHER}.patches_uuid"),
    *_touches("run.py:watch", _RUN, f"{_SAMPLERS}.encode_model_conds", "comfy.model_base.BaseModel.extra_conds"),
    *_touches("run.py:streams", _RUN, f"{_SAMPLERS}.CFGGuider.sample", "comfy.utils.unpack_latents"),
    *_touches("run.py:GenerateMixin", _RUN, "comfy.sd.CLIP.load_model"),
    *_touches("run.py:GenerateMixin", _NEWER, "comfy.sd.CLIP.generate"),
    *_touches("run.py:forget", _NEWER, "comfy.ldm.hidream_o1.model.HiDreamO1Transformer.clear_kv_cache"),
    *_touches("measurement.py:evaluation_rows", _RUN, f"{_SAMPLERS}._calc_cond_batch"),
    *_touches("measurement.py:prompt_of", _OLDER, f"{_SAMPLERS}.CFGGuider.conds"),
    *_touches("measurement.py:prompt_of", _OLDER, "comfy_extras.nodes_custom_sampler.Guider_DualCFG.set_conds"),
    *_touches("measurement.py:level", _OLDER, "comfy.model_sampling.ModelSamplingDiscrete.timestep"),
    *_touches("measurement.py:level", _OLDER, "comfy.model_sampling.ModelSamplingDiscrete.sigma_max"),
    *_touches("measurement.py:measured_eagerly", _RUN, "comfy.patcher_extension.WrappersMP.APPLY_MODEL"),
    *_touches("measurement.py:measured_eagerly", _RUN, "comfy.model_base.BaseModel._apply_model"),
    *_touches("safety_first.py:found_first", _OLDER, "comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE"),
    *_touches("safety_first.py:found_first", _OLDER, f"{_SAMPLERS}.CFGGuider.inner_sample"),
    *_touches("safety_first.py:_found", _OLDER, f"{_SAMPLERS}.calc_cond_batch", f"{_SAMPLERS}.get_area_and_mult"),
    *_touches("safety_first.py:_found", _OLDER, f"{_SAMPLERS}.CFGGuider.conds"),
    *_touches("safety_first.py:_found", _OLDER, "comfy.model_sampling.EPS.noise_scaling"),
    *_touches("safety_first.py:at_their_shares", _OLDER, "comfy.model_base.BaseModel._apply_model"),
    *_touches("memory.py:MemoryMixin", _RUN, f"{_PATCHER}.model_size", f"{_PATCHER}.loaded_size", f"{_PATCHER}.load"),
    *_touches("memory.py:MemoryMixin", _RUN, f"{_PATCHER}.detach"),
    *_touches("memory.py:compute_dtype", _RUN, "comfy.model_base.BaseModel.manual_cast_dtype"),
    *_touches("memory.py:compute_dtype", _RUN, f"{_PATCHER}.model_dtype"),
    *_touches("control_inputs.py:widen", _RUN, "comfy.model_base.Flux.concat_cond", f"{_PATCHER}.get_model_object"),
    *_touches("pending.py:of", _RUN, f"{_PATCHER}.patches", f"{_PATCHER}.add_patches", "comfy.lora.calculate_weight"),
    *_touches("pending.py:ROLES", _RUN, "comfy.weight_adapter.WeightAdapterBase"),
    *_touches("drop_in.py:DropInMixin", _RUN, f"{_PATCHER}.add_patches", f"{_PATCHER}.use_ejected"),
    *_touches("drop_in.py:DropInMixin", _OLDER, f"{_PATCHER}.get_ram_usage"),
    *_touches("hooked_loras.py:HookedMixin", _RUN, f"{_PATCHER}.add_hook_patches", f"{_PATCHER}.patch_hooks"),
    *_touches("hooked_loras.py:HookedMixin", _RUN, f"{_PATCHER}.current_hooks", "comfy.hooks.HookGroup.get_type"),
    *_touches("drop_in.py:_bare", _OLDER, f"{_PATCHER}.remove_wrappers_with_key"),
    *_touches("enforcement/attached.py:_had_guard", _OLDER, f"{_PATCHER}.get_wrappers"),
    *_touches("drop_in.py:DropInClipMixin", _RUN, "comfy.sd.CLIP.clone", "comfy.sd.CLIP.encode_from_tokens"),
    *_touches("drop_in.py:DropInClipMixin", _RUN, "comfy.sd.CLIP.encode_from_tokens_scheduled"),
    *_touches("hooked_loras.py:HookedMixin", _READ, f"{_PATCHER}.forced_hooks"),
    *_touches("drop_in.py:DropInClipMixin", _READ, "comfy.sd.CLIP.use_clip_schedule"),
    *_touches("drop_in.py:DropInClipMixin", _READ, "comfy.hooks.HookGroup.get_hooks_for_clip_schedule"),
    *_touches("pack_samplers.py:PLAIN", _READ, "comfy.sd.CLIP", "comfy.samplers.Sampler"),
    *_touches("bound_vae.py:BoundVaeMixin", _RUN, "comfy.sd.VAE.decode", "comfy.sd.VAE.decode_tiled"),
    *_touches("origins.py:register", _RUN, "comfy.utils.load_torch_file"),
    *_touches("conditioning.py:CARRYING", _RUN, "nodes.NODE_CLASS_MAPPINGS"),
    # nodes that run, and what is said of images
    *_touches("running.py:shows_previews", _RUN, "comfy_execution.progress.get_progress_state"),
    *_touches("running.py:shows_previews", _RUN, "comfy_execution.graph.DynamicPrompt.all_node_ids"),
    *_touches("following.py:_prompt", _RUN, "execution.PromptExecutor.execute_async"),
    *_touches("following.py:_node", _RUN, "execution.get_output_data"),
    *_touches("following.py:EDITS", _RUN, "nodes.NODE_CLASS_MAPPINGS"),
    *_touches("image_values.py:is_video", _READ, "comfy_api.latest.VideoFromComponents"),
    *_touches("told.py:register", _READ, "server.PromptServer.routes"),
    *_touches("told.py:with_entry", _RUN, "execution.get_input_data"),
    *_touches("told.py:SAVES", _RUN, "nodes.SaveImage.save_images"),
    *_touches("told.py:with_verdicts", _RUN, "nodes.SaveImage.save_images", "nodes.PreviewImage"),
    *_touches("told.py:FILMS", _READ, "comfy_extras.nodes_video.SaveVideo", "comfy_extras.nodes_video.SaveWEBM"),
    *_touches("told.py:FILMS", _READ, "comfy_extras.nodes_images.SaveAnimatedPNG"),
    *_touches("told.py:FILMS", _READ, "comfy_extras.nodes_images.SaveAnimatedWEBP"),
    *_touches("weightings.py:_noting", _RUN, "comfy.sd1_clip.SDClipModel.forward"),
    # what is read of models
    *_touches("introspection.py:model_info", _RUN, "comfy.lora.model_lora_keys_unet"),
    *_touches("introspection.py:clip_info", _RUN, "comfy.lora.model_lora_keys_clip"),
    *_touches("introspection.py:_text_roots", _RUN, "comfy.sd1_clip.SDClipModel.transformer"),
    *_touches("introspection.py:original_weight", _RUN, "comfy.model_patcher.get_key_weight", f"{_PATCHER}.backup"),
    *_touches("introspection.py:original_weight", _RUN, f"{_PATCHER}.hook_backup"),
    *_touches("introspection.py:_parts", _RUN, "comfy.quant_ops.QuantizedTensor"),
    *_touches("introspection.py:vae_sha256", _RUN, "comfy.sd.VAE.first_stage_model"),
    *_touches("call_counts.py:PARTS", _READ, "comfy.ldm"),
    *_touches("call_counts.py:text_parts", _RUN, "comfy.text_encoders"),
    *_touches("call_counts.py:_repeated", _RUN, "comfy.ldm.cascade.stage_b.StageB"),
    *_touches("functional.py:_Evaluator", _RUN, f"{_SAMPLERS}.process_conds", f"{_SAMPLERS}.calc_cond_batch"),
    *_touches("functional.py:_Evaluator", _RUN, "comfy.sampler_helpers.prepare_sampling"),
    *_touches("functional.py:_Evaluator", _RUN, "comfy.model_management.throw_exception_if_processing_interrupted"),
    # Make Safety LoRA
    *_touches("text_inputs.py:evaluating", _OLDER, "comfy.sampler_helpers.prepare_sampling"),
    *_touches("text_inputs.py:evaluating", _OLDER, "comfy.sampler_helpers.convert_cond"),
    *_touches("text_inputs.py:evaluating", _OLDER, f"{_SAMPLERS}.process_conds", f"{_SAMPLERS}.calc_cond_batch"),
    *_touches("text_inputs.py:evaluating", _OLDER, f"{_PATCHER}.pre_run", f"{_PATCHER}.cleanup"),
    *_touches("text_inputs.py:ComfyTextModel", _OLDER, "comfy.sd.CLIP.tokenize"),
    *_touches("text_inputs.py:ComfyTextModel", _OLDER, "comfy.sd.CLIP.encode_from_tokens_scheduled"),
    *_touches("functional.py:_bare", _RUN, f"{_PATCHER}.model_options", f"{_PATCHER}.callbacks"),
    *_touches("functional.py:_bare", _RUN, f"{_PATCHER}.attachments", f"{_PATCHER}.forced_hooks"),
    *_touches("functional.py:_bare_clip", _RUN, "comfy.sd.CLIP.layer_idx", "comfy.sd.CLIP.tokenizer_options"),
    *_touches("functional.py:_bare_clip", _RUN, "comfy.sd.CLIP.apply_hooks_to_conds"),
    *_touches("functional.py:_bare_clip", _RUN, "comfy.sd.CLIP.use_clip_schedule"),
    *_touches("functional.py:_raw", _RUN, "comfy.model_sampling.EPS.calculate_denoised"),
    *_touches("calibrating.py:calibrated", _OLDER, "comfy.sample.fix_empty_latent_channels"),
    *_touches("calibrating.py:latent_of", _OLDER, "comfy.latent_formats.LatentFormat.latent_channels"),
    *_touches("calibrating.py:_activities", _OLDER, f"{_SAMPLERS}.process_conds", f"{_SAMPLERS}.calc_cond_batch"),
    *_touches("calibrating.py:_activities", _OLDER, "comfy.sampler_helpers.prepare_sampling"),
    *_touches("calibrating.py:_activities", _OLDER, "comfy.model_sampling.EPS.noise_scaling"),
    # nodes
    *_touches("stock.py:decode", _RUN, "nodes.VAEDecode.decode", "nodes.VAEDecodeTiled.decode"),
    *_touches("stock.py:cfg_guider", _RUN, f"{_SAMPLERS}.CFGGuider.set_conds", f"{_SAMPLERS}.CFGGuider.set_cfg"),
    *_touches("stock.py:sampler_names", _RUN, f"{_SAMPLERS}.KSampler.SAMPLERS", f"{_SAMPLERS}.KSampler.SCHEDULERS"),
    *_touches("model_folders.py:save_place", _RUN, "folder_paths.get_save_image_path"),
    *_touches("inputs.py:LOADERS", _READ, "nodes.LoadImage", "nodes.LoadImageMask", "nodes.LoadImageOutput"),
    *_touches("inputs.py:_input", _READ, "folder_paths.get_annotated_filepath"),
    *_touches("node_report.py:show_progress", _RUN, "server.PromptServer.send_progress_text"),
    *_touches("node_report.py:_send", _RUN, "server.PromptServer.send_sync"),
    *_touches("retries.py:_hints", _READ, "comfy.controlnet.ControlBase.cond_hint_original"),
    *_touches("retries.py:_hints", _READ, "comfy.controlnet.ControlBase.previous_controlnet"),
    *_touches("progress.py:NodeWatch", _RUN, "comfy.utils.ProgressBar.update_absolute"),
    *_touches("progress.py:going_on", _RUN, "comfy.model_management.InterruptProcessingException"),
    # training and audits
    *_touches("untrainable.py:NAMED", _RUN, "comfy.supported_models"),
    *_touches("noising.py:maps_images", _RUN, "comfy.model_sampling.IMG_TO_IMG"),
    *_touches("conditions.py:batches", _RUN, "comfy.conds.CONDRegular", f"{_SAMPLERS}.calc_cond_batch"),
    *_touches("conditions.py:batches", _RUN, "comfy.ldm.hunyuan_video.model.HunyuanVideo"),
    *_touches("conditions.py:_asked", _RUN, "comfy.model_base.BaseModel.extra_conds"),
    *_touches("trainer_model.py:ComfyHostModel", _RUN, "comfy.model_base.BaseModel.apply_model"),
    *_touches("trainer_model.py:ComfyHostModel", _RUN, "comfy.sd.VAE.spacial_compression_encode", "comfy.sd.VAE"),
    *_touches("untrainable.py:STILL", _RUN, "comfy.supported_models"),
    *_touches("trainer_model.py:ComfyHostModel", _RUN, "comfy.latent_formats.LatentFormat.latent_channels"),
    *_touches("trainer_model.py:TEXT_ENCODERS", _RUN, "comfy.sd1_clip.SDTokenizer"),
    *_touches("tokens.py:literal", _RUN, "comfy.sd1_clip.escape_important", "comfy.sd1_clip.unescape_important"),
    *_touches("conditions.py:_sdpa", _RUN, "comfy.ldm.modules.attention.attention_pytorch"),
    *_touches("trainer_model.py:opened", _RUN, "comfy.model_base.BaseModel.manual_cast_dtype"),
    *_touches("trainer_model.py:opened", _RUN, "comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel"),
    *_touches("trainer_model.py:_in_main_memory", _OLDER, f"{_PATCHER}.partially_load", f"{_PATCHER}.detach"),
    *_touches("trainer_model.py:_in_main_memory", _OLDER, "comfy.model_management.unload_all_models"),
    *_touches("trainer_model.py:_clip_skip", _RUN, "comfy.sd.CLIP.clip_layer"),
    *_touches("trainer_model.py:load_checkpoint", _RUN, "comfy.sd.load_state_dict_guess_config"),
    *_touches("trainer_model.py:load_checkpoint", _RUN, "comfy.model_detection.unet_prefix_from_state_dict"),
    *_touches("trainer_model.py:load_checkpoint", _RUN, "comfy.model_detection.model_config_from_unet"),
    *_touches("trainer_model.py:load_checkpoint", _RUN, "comfy.sd.load_diffusion_model_state_dict"),
    *_touches("text_encoder_files.py:load", _RUN, "comfy.sd.load_clip", "comfy.sd.CLIPType"),
    *_touches("text_encoder_files.py:_loaded", _RUN, "comfy.sd1_clip.SDClipModel.load_sd"),
    *_touches("text_encoder_files.py:_check_told", _RUN, "comfy.supported_models_base.ClipTarget"),
    *_touches("trainer_model.py:_cloned_norm_inputs", _RUN, "comfy.clip_model.CLIPLayer"),
    *_touches("fused.py:with_gradients", _NEWER, "comfy.model_management.in_training"),
    *_touches("fused.py:with_gradients", _RUN, "comfy.ops.disable_weight_init"),
    *_touches("noising.py:schedule_of", _RUN, "comfy.model_sampling.EPS.calculate_denoised"),
    *_touches("standalone.py:start", _RUN, "comfy.options.enable_args_parsing", "comfy.cli_args.args.cpu"),
    *_touches("pipeline.py:STEADY", _READ, f"{_SAMPLERS}.KSAMPLER_NAMES"),
    *_touches("pipeline.py:UNREAD", _OLDER, "comfy.clip_model.CLIPTextModel"),
    *_touches("pipeline.py:ComfyPipeline", _READ, "comfy.sample.sample", "comfy.sample.prepare_noise"),
    *_touches("pipeline.py:ComfyPipeline", _READ, "comfy.sample.fix_empty_latent_channels"),
    *_touches("pipeline.py:_check", _READ, f"{_PATCHER}.model_options"),
    *_touches("pipeline.py:_check_sampling", _READ, f"{_SAMPLERS}.KSampler.__init__"),
    *_touches("pipeline.py:_interruptible", _READ, "comfy.model_management.throw_exception_if_processing_interrupted"),
    *_touches("pipeline.py:device", _READ, "comfy.model_management.get_torch_device"),
    *_touches("standalone_pipeline.py:open_pipeline", _READ, "comfy.model_management.get_torch_device"),
    # an operator's policy
    *_touches("enforcement/hooks.py:register", _RUN, "server.PromptServer.add_on_prompt_handler"),
    *_touches("enforcement/hooks.py:on_prompt", _RUN, "server.PromptServer.trigger_on_prompt"),
    *_touches("enforcement/hooks.py:_watching", _RUN, "server.PromptServer.loop"),
    *_touches("enforcement/idle.py:between", _OLDER, "execution.PromptQueue.get"),
    *_touches("enforcement/idle.py:ask", _OLDER, "execution.PromptQueue.not_empty", "execution.PromptQueue.mutex"),
    *_touches("enforcement/idle.py:is_busy", _OLDER, "execution.PromptQueue.currently_running"),
    *_touches("enforcement/tenants.py:register", _OLDER, "server.PromptServer.app"),
    *_touches("enforcement/monitor.py:register", _OLDER, "server.PromptServer.routes"),
    *_touches("enforcement/ready.py:prove", _OLDER, "comfy.model_management.interrupt_current_processing"),
    *_touches("tiny_model.py:tiny_model", _OLDER, "comfy.supported_models.SD15", "comfy.model_base.BaseModel"),
    *_touches("tiny_model.py:sampled", _OLDER, "comfy.sample.sample_custom"),
    *_touches("enforcement/hooks.py:_plain", _RUN, "execution.IsChangedCache.get"),
    *_touches("enforcement/hooks.py:_forget_results", _RUN, "execution.PromptQueue.set_flag"),
    *_touches("enforcement/hooks.py:_node", _RUN, "execution.get_output_data"),
    *_touches("enforcement/hooks.py:_executing", _RUN, "execution.PromptExecutor.execute_async"),
    *_touches("enforcement/hooks.py:_sampling", _RUN, f"{_SAMPLERS}.CFGGuider.sample"),
    *_touches("enforcement/hooks.py:_evaluation", _RUN, "comfy.model_base.BaseModel.apply_model"),
    *_touches("enforcement/leaving.py:no_previews", _RUN, "comfy.utils.ProgressBar.update_absolute"),
    *_touches("enforcement/leaving.py:no_previews", _READ, "comfy_execution.progress.ProgressRegistry.update_progress"),
    *_touches("enforcement/leaving.py:no_values", _READ, "execution.format_value"),
    *_touches("enforcement/leaving.py:EXECUTORS", _RUN, "comfy_execution.graph.DynamicPrompt"),
    *_touches("enforcement/leaving.py:EXECUTORS", _RUN, "comfy_execution.graph_utils.ExecutionBlocker"),
    *_touches("enforcement/leaving.py:MARKS", _RUN, "nodes.VAEDecode.decode"),
    *_touches("enforcement/leaving.py:_is_video", _RUN, "comfy_api.latest.VideoFromComponents"),
    *_touches("enforcement/leaving.py:_returned", _RUN, "execution.get_output_from_returns"),
    *_touches("enforcement/node_info.py:classes", _RUN, "nodes.NODE_CLASS_MAPPINGS"),
    *_touches("enforcement/node_info.py:_is_core", _RUN, "nodes.load_custom_node"),
    *_touches("enforcement/policy.py:folder", _RUN, "folder_paths.get_system_user_directory"),
    *_touches("enforcement/texts.py:tokenizing", _RUN, "comfy.sd.CLIP.tokenize"),
    *_touches("enforcement/texts.py:encoding", _RUN, "comfy.sd.CLIP.encode_from_tokens"),
    *_touches("enforcement/texts.py:encoding_scheduled", _RUN, "comfy.sd.CLIP.encode_from_tokens_scheduled"),
    *_touches("enforcement/texts.py:handing_over", _RUN, f"{_SAMPLERS}.encode_model_conds"),
    *_touches("enforcement/texts.py:_sections", _RUN, "comfy.sd1_clip.SDTokenizer.tokenize_with_weights"),
    *_touches("enforcement/weights.py:loading", _RUN, "comfy.utils.load_torch_file"),
    *_touches("enforcement/weights.py:loading", _RUN, "comfy.clip_vision.load_torch_file"),
    *_touches("enforcement/weights.py:finding", _RUN, "folder_paths.get_full_path"),
    *_touches("enforcement/weights.py:ENDINGS", _RUN, "comfy.sd1_clip.load_embed"),
    *_touches("enforcement/weights.py:_module", _RUN, "comfy.sd.CLIP.cond_stage_model", f"{_PATCHER}.model"),
    *_touches("enforcement/weights.py:using", _RUN, "comfy.sd.VAE.decode", "comfy.sd.VAE.decode_tiled"),
    # what the core does as ComfyUI does it, without importing it
    Touch("comfy.weight_adapter.adapters", "modular_lora/files/formats/__init__.py:FORMATS", _RUN),
    Touch("comfy.text_encoders.t5.T5LayerNorm", "modular_lora/branches/norms.py:_RMS", _RUN),
    Touch("comfy.ldm.flux.layers.RMSNorm", "modular_lora/branches/norms.py:_EPS", _OLDER),
    Touch("comfy.sd1_clip.SDTokenizer", "training/kohya/engine.py:COMFYUI_TOKENIZER", _RUN),
    Touch("nodes.NODE_CLASS_MAPPINGS", "operators/leaving.py:SOURCES", _RUN),
)
